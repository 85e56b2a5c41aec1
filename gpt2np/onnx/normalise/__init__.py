"""From the file to a graph in plain operators: functions inlined, a branch taken, nodes rewritten."""
