"""Drives the stage notebooks: parameters, graph, execution, ledger, reports, command line."""
