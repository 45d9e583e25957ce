"""Vocabulary shared by every kernel tree; nothing here asks which architecture it runs on."""
