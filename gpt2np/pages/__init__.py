"""Pages for people: a report to look at, and a model file from its blocks down to the lines of reference.py.

evidence.py sums up what a page shows of the taps while their arrays are there; drawings.py makes the pictures;
report_page.py and graph_page.py put them into one file each.
"""
