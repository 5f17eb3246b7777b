_base_ = ['_base_/views.py', '_base_/lars_200e.py', '_base_/runtime.py']

temperature = 1.0
crop = dict(type='RandomResizedCrop', size=224, scale=(0.2, 1.), backend='pillow')
jitter = dict(
    type='RandomApply',
    transforms=[dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)],
    prob=0.8)
views = [
    [crop, jitter, _base_.gray, dict(_base_.blur, prob=1.), dict(type='RandomSolarize', prob=0.), _base_.flip],
    [crop, jitter, _base_.gray, dict(_base_.blur, prob=0.1), dict(type='RandomSolarize', prob=0.2), _base_.flip],
]
train_pipeline = [_base_.load, dict(type='MultiView', num_views=[1, 1], transforms=views), _base_.pack]
train_dataloader = dict(batch_size=512, num_workers=4, pin_memory=True, dataset=dict(pipeline=train_pipeline))
mlp = dict(
    type='NonLinearNeck', hid_channels=4096, out_channels=256, num_layers=2, with_bias=False, with_last_bn=True,
    with_last_bn_affine=False, with_last_bias=False)
model = dict(
    type='MoCoV3',
    base_momentum=0.99,
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN')),
    neck=dict(mlp, in_channels=2048, with_avg_pool=True, vit_backbone=False),
    head=dict(
        type='MoCoV3Head',
        predictor=dict(mlp, in_channels=256, with_avg_pool=False, with_last_bn=False),
        loss=dict(type='mmcls.CrossEntropyLoss', loss_weight=2 * temperature),
        temperature=temperature))
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic', optimizer=dict(lr=9.6))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, begin=0, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=90, by_epoch=True, begin=10, end=100, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=100)
auto_scale_lr = dict(base_batch_size=4096)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
