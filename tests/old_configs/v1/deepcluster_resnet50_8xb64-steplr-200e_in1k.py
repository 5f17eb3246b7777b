_base_ = ['_base_/views.py', '_base_/steps_200e.py', '_base_/runtime.py']

dataset_type = 'DeepClusterImageNet'
num_classes = 10000
train_pipeline = [
    _base_.load,
    dict(type='RandomResizedCrop', size=224, backend='pillow'),
    _base_.flip,
    dict(type='RandomRotation', degrees=2),
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=1.0, hue=0.5),
    _base_.gray,
    dict(type='PackSelfSupInputs', pseudo_label_keys=['clustering_label'], meta_keys=['img_path']),
]
extract_pipeline = [
    _base_.load,
    dict(type='mmcls.ResizeEdge', scale=256, edge='short', backend='pillow'),
    dict(type='CenterCrop', crop_size=224),
    _base_.pack,
]
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    sampler=dict(_delete_=True, type='DeepClusterSampler', shuffle=True),
    dataset=dict(type=dataset_type, pipeline=train_pipeline))
model = dict(
    type='DeepCluster',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='BN')),
    neck=dict(type='AvgPool2dNeck'),
    head=dict(
        type='ClsHead', loss=dict(type='mmcls.CrossEntropyLoss'), with_avg_pool=False, in_channels=2048,
        num_classes=num_classes))
custom_hooks = [
    dict(
        type='DeepClusterHook',
        extract_dataloader=dict(
            batch_size=128,
            num_workers=8,
            persistent_workers=True,
            sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
            dataset=dict(
                type=dataset_type,
                data_root=_base_.data_root,
                ann_file='meta/train.txt',
                data_prefix=dict(img_path='train/'),
                pipeline=extract_pipeline)),
        clustering=dict(type='Kmeans', k=num_classes, pca_dim=256),
        unif_sampling=True,
        reweight=False,
        reweight_pow=0.5,
        initial=True,
        interval=1)
]
optim_wrapper = dict(
    optimizer=dict(lr=0.1, weight_decay=1e-5), paramwise_cfg=dict(custom_keys={'head': dict(momentum=0.)}))
param_scheduler = [dict(type='MultiStepLR', by_epoch=True, milestones=[400], gamma=0.1)]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
