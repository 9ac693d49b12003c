-- Run once, when the volume is new: `finetune` (the ledger and the router's tables) is made by the image itself.
CREATE DATABASE dagster;
