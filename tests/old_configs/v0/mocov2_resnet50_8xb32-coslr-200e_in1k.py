_base_ = ['_base_/mocov2_views.py', '_base_/sgd_200e.py', '_base_/runtime.py']

dim = 128
model = dict(
    type='MoCo',
    queue_len=2**16,
    feat_dim=dim,
    momentum=0.999,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='BN')),
    neck=dict(type='MoCoV2Neck', in_channels=2048, hid_channels=2048, out_channels=dim, with_avg_pool=True),
    head=dict(type='ContrastiveHead', temperature=0.2))

# only the newest three are kept
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
