"""Which rank each layer gets: goals, damage, costs, allocation, and the search for a plan."""
