"""Backends that run stages on other machines: Ray, Argo Workflows, KubeRay."""
