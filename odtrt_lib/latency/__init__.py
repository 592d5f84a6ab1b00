"""Chapter 7: how long a detector takes, where the time goes, and whether that stays so for days.

``timing`` times calls and keeps the times in bounded memory.
"""
