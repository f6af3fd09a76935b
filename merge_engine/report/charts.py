"""The colours and markers of all plots."""

NAMED = 10  # so many lines get a colour and a name; the others are grey
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # safe for colour-blind readers
MARKERS = "os^Dv"
