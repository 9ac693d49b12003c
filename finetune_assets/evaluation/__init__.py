"""Should anybody be served by this model? Candidates, measures with intervals, gates, report and card.

candidates   base, few-shot, tuned: who is asked what, on the same frozen test rows
benchmark    `prepare` writes what the worker runs, `summarise` turns its outputs into the report's content
measures     of each candidate, as row sums that any resample can use (`statistics`)
rules        what the assistant's YAML says a reply must and must not hold
gates        what a version must reach to be served, decided on intervals
report, card what people read
"""
