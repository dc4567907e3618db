"""What mends a pruned model: layers refitted without training, and the fine-tune."""
