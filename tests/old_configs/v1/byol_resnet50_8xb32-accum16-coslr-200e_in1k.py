_base_ = ['_base_/views.py', '_base_/lars_200e.py', '_base_/runtime.py']

first = [
    dict(type='RandomResizedCrop', size=224, interpolation='bicubic', backend='pillow'),
    _base_.flip,
    dict(
        type='RandomApply',
        transforms=[dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)],
        prob=0.8),
    _base_.gray,
    dict(_base_.blur, prob=1.),
    dict(type='RandomSolarize', prob=0.),
]
second = [first[0], first[1], first[2], first[3], dict(_base_.blur, prob=0.1), dict(type='RandomSolarize', prob=0.2)]
train_pipeline = [
    _base_.load,
    dict(type='MultiView', num_views=[1, 1], transforms=[first, second]),
    _base_.pack,
]
train_dataloader = dict(num_workers=4, dataset=dict(pipeline=train_pipeline))
mlp = dict(type='NonLinearNeck', hid_channels=4096, out_channels=256, num_layers=2, with_bias=True, with_last_bn=False)
model = dict(
    type='BYOL',
    base_momentum=0.99,
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN')),
    neck=dict(mlp, in_channels=2048, with_avg_pool=True),
    head=dict(
        type='LatentPredictHead',
        predictor=dict(mlp, in_channels=256, with_avg_pool=False),
        loss=dict(type='CosineSimilarityLoss')))
optim_wrapper = dict(accumulative_counts=16)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
