"""The planner's search: from a model, a size and a machine to the plan that is predicted to serve best."""
