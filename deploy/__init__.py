"""Commands of the workflows: image tags, changed components, the GitOps repository, checks."""
