"""Run the stage notebooks: parameters, graph, execution, run store, reports, command line."""
