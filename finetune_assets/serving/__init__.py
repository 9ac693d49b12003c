"""From a model to its users: router, upstreams, rollout with its guards, dashboard; and what users say, back into the corpus."""
