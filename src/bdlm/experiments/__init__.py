"""Experiments as data: plans of training runs and measurements, resumable, with reports and
figures."""
