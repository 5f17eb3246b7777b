_base_ = ['_base_/cluster_views.py', '_base_/sgd_200e.py', '_base_/runtime.py']

model = dict(
    type='DeepCluster',
    with_sobel=False,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='BN')),
    neck=dict(type='AvgPool2dNeck'),
    head=dict(type='ClsHead', with_avg_pool=False, in_channels=2048, num_classes={{_base_.num_classes}}))
custom_hooks = [
    dict(
        type='DeepClusterHook',
        extractor={{_base_.extractor}},
        clustering={{_base_.clustering}},
        unif_sampling=True,
        reweight=False,
        reweight_pow=0.5,
        initial=True,
        interval=1)
]
optimizer = dict(lr=0.1, weight_decay=1e-5, paramwise_options={'\\Ahead.': dict(momentum=0.)})
lr_config = dict(_delete_=True, policy='step', step=[400])
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
