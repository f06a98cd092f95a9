"""The command ``flash-sfa bench``: SFA against dense attention on this machine's GPU."""
