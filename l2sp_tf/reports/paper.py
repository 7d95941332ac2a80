"""The paper's own numbers and names, to stand beside those of the runs."""

# Table 1, by the names of `data.table_1_rows`: database, task category, training and test images a class, classes.
TABLE_1 = {
    "caltech256/30": ("Caltech 256 - 30", "generic object recog.", "30", "> 20", 257),
    "caltech256/60": ("Caltech 256 - 60", "generic object recog.", "60", "> 20", 257),
    "stanford_dogs": ("Stanford Dogs 120", "specific object recog.", "100", "~ 72", 120),
    "mit_indoors67": ("MIT Indoors 67", "scene classification", "80", "20", 67),
}
# Table 2 by target and penalty: test accuracy in percent, mean and standard deviation of 5 runs.
TABLE_2 = {
    "MIT Indoors 67": {"l2": (79.6, 0.5), "l2_sp": (84.2, 0.3), "l2_sp_fisher": (84.0, 0.4)},
    "Stanford Dogs 120": {"l2": (81.4, 0.2), "l2_sp": (85.1, 0.2), "l2_sp_fisher": (85.1, 0.2)},
    "Caltech 256 - 30": {"l2": (83.5, 0.3), "l2_sp": (85.7, 0.1), "l2_sp_fisher": (85.7, 0.1)},
    "Caltech 256 - 60": {"l2": (88.2, 0.2), "l2_sp": (89.6, 0.1), "l2_sp_fisher": (89.6, 0.1)},
}
# Table 3 by target and penalty: percentage points of accuracy lost on the source task.
TABLE_3 = {
    "MIT Indoors 67": {"l2": 24.1, "l2_sp": 5.3, "l2_sp_fisher": 4.9},
    "Stanford Dogs 120": {"l2": 14.1, "l2_sp": 4.7, "l2_sp_fisher": 4.2},
    "Caltech 256 - 30": {"l2": 18.2, "l2_sp": 3.6, "l2_sp_fisher": 3.0},
    "Caltech 256 - 60": {"l2": 21.8, "l2_sp": 3.4, "l2_sp_fisher": 2.8},
}
# What the paper calls its data sets and its penalties; these in the order of Eqs. (1)-(7).
DATA_SETS = {"mit_indoors67": "MIT Indoors 67", "stanford_dogs": "Stanford Dogs 120", "caltech256": "Caltech 256"}
PENALTIES = {
    "l2": "L2",
    "l2_sp": "L2-SP",
    "l2_sp_fisher": "L2-SP-Fisher",
    "l1_sp": "L1-SP",
    "gl_sp": "GL-SP",
    "gl_sp_fisher": "GL-SP-Fisher",
}
