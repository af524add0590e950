"""Rows grouped by expert times the weight of their expert."""
