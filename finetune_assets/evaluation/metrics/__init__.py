"""Local `evaluate.Metric` modules: `evaluate.load("…/metrics/bleu.py")` reads them from disk, no hub, no network.

Each gives the score of the whole set, and `statistics`: one row of sufficient statistics a reply, whose sums give the score of
any resample. A row whose reference is empty has nothing to be compared with: it is left out, with zeros (null for ROUGE-L) for
statistics. The worker computes them, so the Dagster process never imports `evaluate`; `text_scores` turns sums into scores.
"""
