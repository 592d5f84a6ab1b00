"""Chapter 7: how long a detector takes, where the time goes, and whether that stays so for days.

``timing`` times calls and keeps the times in bounded memory. ``recorder`` records the steps of frames,
``calls`` names other libraries' calls that cost time, ``profile`` says where the time goes and what of it can
be avoided, and ``timeline`` shows that. ``roofline`` says how long a network takes at least.
"""
