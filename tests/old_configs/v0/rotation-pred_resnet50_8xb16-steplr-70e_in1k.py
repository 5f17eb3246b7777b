_base_ = ['_base_/mocov2_views.py', '_base_/sgd_200e.py', '_base_/runtime.py']

train_pipeline = [
    dict(type='RandomResizedCrop', size=224),
    dict(type='RandomHorizontalFlip'),
    dict(type='ToTensor'),
    dict(type='Normalize', **{{_base_.img_norm_cfg}}),
]
data = dict(
    samples_per_gpu=16,
    train=dict(_delete_=True, type='RotationPredDataset', data_source={{_base_.source}}, pipeline=train_pipeline))
model = dict(
    type='RotationPred',
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN')),
    head=dict(type='ClsHead', with_avg_pool=True, in_channels=2048, num_classes=4))
optimizer = dict(lr=0.2)
lr_config = dict(
    _delete_=True, policy='step', step=[30, 50],
    warmup='linear', warmup_iters=5, warmup_ratio=0.1, warmup_by_epoch=True)
runner = dict(max_epochs=70)
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
