"""Training a LongNet language model on bytes: text, schedule, loop, checkpoints that continue exactly, evaluation."""
