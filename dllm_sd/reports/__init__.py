"""Tables and pages for people: memory estimates, methods, results."""
