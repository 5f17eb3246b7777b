_base_ = ['_base_/weak_views.py', '_base_/sgd_200e.py', '_base_/runtime.py']

model = dict(
    type='NPID',
    neg_num=65536,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN')),
    neck=dict(type='LinearNeck', in_channels=2048, out_channels=128, with_avg_pool=True),
    head=dict(type='ContrastiveHead', temperature=0.07),
    memory_bank=dict(type='SimpleMemory', length=1281167, feat_dim=128, momentum=0.5))
lr_config = dict(_delete_=True, policy='step', step=[120, 160])
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
