"""What can be known of a model before it is trained further.

audit       do gradients reach all that trains, and are they those of the loss
levels      held-out text in levels of difficulty
crossing    at which level an accuracy is crossed, if at any
noise       how much gradients of one level differ from batch to batch
assess      all of that together
"""
