"""Where stages run besides this machine: Ray, Argo Workflows, KubeRay."""
