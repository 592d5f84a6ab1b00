"""Chapter 7: how long a detector takes, where the time goes, and whether that stays so for days.

``timing`` times calls and keeps the times in bounded memory. ``recorder`` records the steps of frames,
``calls`` names other libraries' calls that cost time, ``profile`` says where the time goes and what of it can
be avoided, and ``timeline`` shows that. ``roofline`` says how long a network takes at least.

``soak`` runs a detector for days: ``belt`` is its camera, with faults; ``worker`` is the process in which it
runs, ``board`` what that process shows, and ``watchdog`` restarts it; ``sensors`` reads the machine;
``slopes`` and ``verdict`` judge; ``charts`` and ``soak_report`` show.
"""
