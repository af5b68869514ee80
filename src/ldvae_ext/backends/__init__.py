"""Backends: how the loss and the posterior of a minibatch are computed."""
