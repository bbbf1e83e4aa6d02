"""Evidence on suspected distillation: which key's mark texts carry."""
