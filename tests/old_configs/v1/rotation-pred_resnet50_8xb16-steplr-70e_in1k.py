_base_ = ['_base_/views.py', '_base_/steps_200e.py', '_base_/runtime.py']

train_pipeline = [
    _base_.load,
    dict(type='RandomResizedCrop', size=224, backend='pillow'),
    _base_.flip,
    dict(type='RotationWithLabels'),
    dict(type='PackSelfSupInputs', pseudo_label_keys=['rot_label'], meta_keys=['img_path']),
]
train_dataloader = dict(batch_size=16, num_workers=2, dataset=dict(pipeline=train_pipeline))
model = dict(
    type='RotationPred',
    data_preprocessor=dict(_base_.data_preprocessor, type='mmselfsup.RotationPredDataPreprocessor'),
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN')),
    head=dict(
        type='ClsHead', loss=dict(type='mmcls.CrossEntropyLoss'), with_avg_pool=True, in_channels=2048, num_classes=4))
optim_wrapper = dict(optimizer=dict(lr=0.2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='MultiStepLR', by_epoch=True, milestones=[30, 50], gamma=0.1),
]
train_cfg = dict(max_epochs=70)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
