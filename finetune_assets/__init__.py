"""Turns a chat assistant's conversations and feedback into a better, cheaper model, and proves that it is better.

Floors, each importing only from below: `definitions` > `assets`, `automation` > `resources` > `registry`, `evaluation`,
`training`, `dataset`, `corpus`, `assistants` > `storage`, `environment`, `errors`. `worker` is the child process: with the
serving engine the only folder that imports torch.
"""

__version__ = "0.1.0"
