"""Objectives beside supervised tuning on real text: what they win, and what the model forgets."""
