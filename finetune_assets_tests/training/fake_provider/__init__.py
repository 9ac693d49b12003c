"""A stand-in for OpenAI's fine-tuning API on a real socket, held to the published description.

It remembers, and can be told to fail. It proves the wire, not that a provider takes the job. Its "training" is real in one way: a
tuned model answers with the reply of the training row that is most like the question.
"""

from finetune_assets_tests.training.fake_provider.process import FakeProvider, start

__all__ = ["FakeProvider", "start"]
