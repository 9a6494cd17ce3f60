"""8-bit AdamW: bitsandbytes' on the card, ours under CPU offload."""
