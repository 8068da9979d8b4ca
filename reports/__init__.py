"""The look of the reports: templates and style, filled in by `runner.render`."""
