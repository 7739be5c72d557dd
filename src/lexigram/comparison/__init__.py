"""`compare`: recipes planned, run one after the other on one calibration, and shown as a table and as a plot."""
