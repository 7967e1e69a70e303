"""Losses as pure functions of tensors: no logging, no mutation, targets detached here so that no caller can forget."""
