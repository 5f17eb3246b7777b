_base_ = ['_base_/mocov2_views.py', '_base_/sgd_200e.py', '_base_/runtime.py']

model = dict(
    type='DenseCL',
    queue_len=65536,
    feat_dim=128,
    momentum=0.999,
    loss_lambda=0.5,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='BN')),
    neck=dict(type='DenseCLNeck', in_channels=2048, hid_channels=2048, out_channels=128, num_grid=None),
    head=dict(type='ContrastiveHead', temperature=0.2))
custom_hooks = [dict(type='DenseCLHook', start_iters=0)]
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
