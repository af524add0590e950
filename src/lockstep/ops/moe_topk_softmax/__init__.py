"""Routing by softmax: the experts of each token and their weights."""
