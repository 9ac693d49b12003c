"""People's judgement: blind pairs of replies and a queue of training examples, who rates what, and what it says.

study        items, raters and who gets which; a folder `<home>/ratings/<assistant>/<study>/`
links        signed links of raters
book         the ledger's table `ratings`, and files in and out
statistics   win rate, interval, agreement, position bias
"""
