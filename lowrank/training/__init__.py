"""A training run: a config becomes a checked run, which steps, saves, logs, evaluates and reports.

A reader follows one step through these files, in this order:

1. `training/loop.py`: `_train_steps` takes a batch, calls the compiled step, logs, evaluates and saves.
2. `training/step.py`: `make_step` computes the gradient of the trained leaves and applies the optimizer's update.
3. `training/run.py`: `loss` binds the method's shared leaves and calls the objective's loss.
4. `objectives/causal_lm.py`: `language_loss` applies the model and returns the sum of losses and its weight.

The parameters, `params`, go from the checkpoint to the update through these files, in this order:

1. `training/loop.py`: `train` runs a `Trainer`, whose constructor loads and attaches the parameters.
2. `training/run.py`: `load` and `attach` call the two rooms below, and `start` returns the first state.
3. `pretrained/load.py`: `load` maps the tensors of a checkpoint to the leaves of the model.
4. `pretrained/load_tensors.py`: `load_leaves` reads each leaf, shard by shard, onto its devices.
5. `core/sharding.py`: `parameter_shardings` gives each leaf its place on the mesh.
6. `methods/attachment.py`: `attach` applies the method's rules, and `trainable_mask` names the trained leaves.
7. `core/tree.py`: `split` separates the trained leaves from the frozen leaves, and `join` reunites them in the loss.
8. `training/step.py`: `make_step` updates the trained leaves and returns the next state.
9. `training/optimizer.py`: `build_optimizer` returns the transformation of the gradients of the trained leaves.
10. `training/offload.py`: `stream_state` applies the update where the optimizer's state lies in host memory.
"""
