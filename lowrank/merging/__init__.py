"""Models and adapters combined: rules of merging, recipes, and what a merge loses."""
