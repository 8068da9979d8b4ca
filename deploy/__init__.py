"""What the workflows call: names of images, what has changed, the GitOps repository."""
