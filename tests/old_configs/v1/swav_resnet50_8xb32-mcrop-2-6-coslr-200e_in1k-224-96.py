_base_ = ['_base_/views.py', '_base_/runtime.py']

num_crops = [2, 6]
colors = [
    dict(
        type='RandomApply',
        transforms=[dict(type='ColorJitter', brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)],
        prob=0.8),
    _base_.gray,
    _base_.blur,
    _base_.flip,
]
large = [dict(type='RandomResizedCrop', size=224, scale=(0.14, 1.), backend='pillow')] + colors
small = [dict(type='RandomResizedCrop', size=96, scale=(0.05, 0.14), backend='pillow')] + colors
train_dataloader = dict(
    dataset=dict(
        pipeline=[_base_.load, dict(type='MultiView', num_views=num_crops, transforms=[large, small]), _base_.pack]))
model = dict(
    type='SwAV',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN'), zero_init_residual=True),
    neck=dict(type='SwAVNeck', in_channels=2048, hid_channels=2048, out_channels=128, with_avg_pool=True),
    head=dict(
        type='SwAVHead',
        loss=dict(type='SwAVLoss', feat_dim=128, epsilon=0.05, temperature=0.1, num_crops=num_crops)))
custom_hooks = [
    dict(
        type='SwAVHook',
        priority='VERY_HIGH',
        batch_size=_base_.train_dataloader.batch_size,
        epoch_queue_starts=15,
        crops_for_assign=[0, 1],
        feat_dim=128,
        queue_length=3840,
        frozen_layers_cfg=dict(prototypes=5005))
]
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='LARS', lr=0.6, weight_decay=1e-6, momentum=0.9))
param_scheduler = [
    dict(
        type='CosineAnnealingLR', T_max=200, eta_min=6e-4, by_epoch=True, begin=0, end=200, convert_to_iter_based=True)
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=200)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
find_unused_parameters = True
