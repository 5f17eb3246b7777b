_base_ = ['_base_/weak_views.py', '_base_/sgd_200e.py', '_base_/runtime.py']

data = dict(
    train=dict(
        _delete_=True,
        type='MultiViewDataset',
        data_source={{_base_.source}},
        num_views=[2],
        pipelines=[{{_base_.train_pipeline}}],
        prefetch={{_base_.prefetch}}))
model = dict(
    type='MoCo',
    queue_len=65536,
    feat_dim=128,
    momentum=0.999,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='BN')),
    neck=dict(type='LinearNeck', in_channels=2048, out_channels=128, with_avg_pool=True),
    head=dict(type='ContrastiveHead', temperature=0.07))
lr_config = dict(_delete_=True, policy='step', step=[120, 160])
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
