"""Tuning: pretraining, full fine-tuning and LoRA with one plain training loop."""
