"""DC-ViT: dense few-shot compression, its trials and its synthetic images."""
