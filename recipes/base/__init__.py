"""What the recipes share: settings, text, training one model, counting FLOPs, reporting."""
