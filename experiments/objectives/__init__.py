"""Objectives on BBC news: preferences that a stated rule makes of real text."""
