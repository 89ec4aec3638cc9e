"""A study: one policy in many ways, all on the same episodes, with statistics that say what that shows."""
